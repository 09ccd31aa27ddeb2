"""Time, memory and operations of everything this project computes, on the machine it runs on."""
