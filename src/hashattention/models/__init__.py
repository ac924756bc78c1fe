"""Models: finding them (`source`) and recording their queries and keys (`capture`)."""
