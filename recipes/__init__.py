"""How everything that the package ships was trained and measured."""
