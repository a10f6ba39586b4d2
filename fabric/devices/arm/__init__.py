"""ARM devices: the GIC models and the ITS."""
