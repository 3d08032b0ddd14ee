"""Methods for :func:`sdcore.patch`."""
