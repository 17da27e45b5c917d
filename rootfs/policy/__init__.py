"""Policies on the host: made from packs and from lists of others, compared, explained."""
