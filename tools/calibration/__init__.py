"""Behind tools/calibrate.py: parallel data, comparisons of texts, how fair a calibration is, and the report."""
