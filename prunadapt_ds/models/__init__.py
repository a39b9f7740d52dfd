"""Architecture records, layouts, and the modelling file that every pruned export carries."""
