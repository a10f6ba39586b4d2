"""What a run is made of: scenarios in TOML, and the traces of real hosts as a load."""
