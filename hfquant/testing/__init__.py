"""What authors of backends and hfquant's own tests share: tiny models, a local Hub, conformance checks."""
