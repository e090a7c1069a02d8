"""PEFT adapters on packed layers: how they start and what they may be attached to."""
