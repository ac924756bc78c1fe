"""Integrations with the libraries that run models; nothing below knows that they exist."""
