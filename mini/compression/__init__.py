"""Runs made smaller."""
