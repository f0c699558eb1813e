"""How fast A- and B-steps are: bare networks (limit), the real loop (ours), the research documents' loop (plain)."""
