"""Measuring a served model: planted facts (`needle`), every sparse step (`observe`), the demo run (`demo`)."""
