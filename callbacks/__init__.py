"""Drop-in callbacks for any LightningModule that meets the protocols of ``lightning_lm.protocols``."""

if __name__ != "lightning_lm.callbacks":
    raise ImportError(f"This folder was imported as {__name__!r}; import it as 'lightning_lm.callbacks'.")
