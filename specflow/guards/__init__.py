"""What comes from outside, looked at before it is used: arguments, ids, and what users' parts answer."""
