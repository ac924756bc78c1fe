"""Selectors: the methods that choose which tokens a query attends to, one short file each."""
