"""What an SAE is worth: splicing, logit lens, probes, density and labels."""
