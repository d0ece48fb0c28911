"""Prepared dataset folders (`layout`) and how models see them (`dataset`)."""
