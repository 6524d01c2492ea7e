#include "/usr/include/linux/in.h"
