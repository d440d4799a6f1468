"""How fine-tunes are stored small: bit-exact differences, the largest entries, masks, superposition, low rank."""
