"""Models from folders and the hub: towers, whole editors, quantisation, memory plans."""
