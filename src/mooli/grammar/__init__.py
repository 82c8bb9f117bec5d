"""Which tokens a grammar allows: compiled aside, asked for by the scheduler. Ids and bytes, no text, no device."""
