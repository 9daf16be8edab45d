"""What is measured of an edited image."""
