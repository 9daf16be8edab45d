"""How the miniature family was trained."""
