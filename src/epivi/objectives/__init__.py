"""The equations: one function each, in closed form, named by paper and number."""
