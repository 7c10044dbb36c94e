"""`python -m analysis SOURCE... --out DIR` is `fastbp-report`."""

from analysis.cli import main

if __name__ == "__main__":
    main()
