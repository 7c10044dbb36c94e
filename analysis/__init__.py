"""Reads records and reports: accuracy against time, with intervals over seeds. Imports nothing else of this project."""
