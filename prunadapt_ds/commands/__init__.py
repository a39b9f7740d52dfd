"""The programs of the command line besides training: one module for each, and what only they need."""
