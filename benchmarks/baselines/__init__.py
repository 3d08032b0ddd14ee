"""Published methods as their authors' code computes them, written anew for comparison."""
