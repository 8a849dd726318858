"""Several models on one box while clients come and go, unload, and kill workers."""
