"""The service layer: takes requests, decides where they run, hands out what they say. No engine code."""
