/* The smallest sensor: the benchmarks are not to measure a shell. */
#include <unistd.h>

int main(void) { return write(1, "42\n", 3) != 3; }
