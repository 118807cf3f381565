"""The demo: a real sentence encoder, pruned, packed, run and compared honestly with its dense self."""
