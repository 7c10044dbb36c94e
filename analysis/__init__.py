"""Reads records and reports accuracy against time, with intervals over seeds; imports nothing of ours."""
