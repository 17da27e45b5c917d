"""What the host may ask of this guest, and what the host may learn: one document, one decision."""
