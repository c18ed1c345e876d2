"""Relevance rule tables, one file each."""
