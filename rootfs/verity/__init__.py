"""Hash trees: formatter, verifier and the hashing below them."""
