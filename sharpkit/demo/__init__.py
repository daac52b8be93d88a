"""A small real zoo: trained, scored, correlated and drawn by one command."""
