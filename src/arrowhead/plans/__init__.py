"""What a plan is: frozen values and their arithmetic, without models and without diffusers."""
