"""The synthetic world: scenes, instructions, cases with known answers, and the miniature that reads them."""
