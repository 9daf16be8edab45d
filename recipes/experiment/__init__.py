"""How the miniature's bridge was chosen, trained and tested."""
