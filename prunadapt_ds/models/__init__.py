"""Architecture records, layouts and the exported folder's own modelling file."""
