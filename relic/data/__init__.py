"""Shards, their index, and the data module that trains from them."""
