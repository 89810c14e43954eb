"""What everything stands on: rows (`schema`), scales, the run store, and what comes from outside. Imports nothing of ours."""
