"""The command line: the only composer of everything. Nothing else imports it; no policy lives here."""
