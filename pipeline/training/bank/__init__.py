"""The teacher bank: teachers' outputs, computed once and looked up by view."""
