"""Failover decisions: who is suspected, who is to blame, who resumes where. Pure; the front acts on them."""
