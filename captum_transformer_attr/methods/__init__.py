"""The public attribution classes, one file each."""
