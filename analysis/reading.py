"""How to read the report: what the numbers are, and where their intervals are known to cover less than they say."""

HOW = (
    "Training time counts training steps only, synchronised with the device; evaluation, warm-up, compilation and "
    "checkpoints have their own columns. Only runs measured alone on their device, finished and never resumed, "
    "stand on a time axis.",
    "Accuracies are of the last epoch, not the best. Settings were chosen on the validation split.",
    "n counts seeds. Means, differences and ratios have Student's t intervals (ratios on the log scale). Medians "
    "have the interval of their order statistics: below five seeds it is the range and covers less than 95 %: 88 % "
    "at four, 75 % at three, 50 % at two.",
    "Hypervolume and speed-up at equal accuracy have bootstrap standard errors with Student's t. In simulations the"
    " hypervolume's interval covers the truth in 93 to 97 of 100 sweeps, with two known exceptions: at three seeds "
    "whose accuracies vary more than their times it is too wide (97 to 98 %), and where all arms are equal too "
    "narrow (91 to 92 % for five equal arms of ten seeds), since a front picks the luckiest.",
    "The paired bootstrap in the table of tests is reliable from ten pairs on (94 %); with five it covers the truth"
    " in 93 % and with three in 74 % of sweeps instead of 95 %. It is shown beside the t test and decides nothing.",
    "What compares times (speed-up, P(on front), hypervolume) uses geometric means, paired by seed; the points are "
    "medians. P(on front) is the share of draws of all arms' true places, given the seeds, in which the arm is on "
    "the front; for two arms that are equal in the other outcome it is the one-sided p of the paired t test. In "
    "simulations it is within 0.07 of the truth from three seeds on, and without a value for one.",
    "A method wins or loses only where the paired t test, corrected by Holm over all methods of its section in time"
    " and accuracy, is below 5 %. Each section, that is each task on one kind of hardware, is corrected for itself,"
    " and so is each table of an ablation: of twenty sections in which nothing differs, about one may still call a "
    "difference. The intervals in brackets are not corrected. “No clear difference” does not mean equal: the tests'"
    " table says which effects so many seeds could have shown.",
    "A claim about time to a target is judged from five paired seeds on, any other from three; claims are not "
    "corrected for their number.",
)
"""One paragraph each; the figures are those of `tests/test_analysis_proof.py`."""
