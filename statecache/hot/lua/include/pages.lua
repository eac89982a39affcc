-- How many entries the next XRANGE takes. Redis copies all of a page before the first of its bytes can be counted, so pages
-- begin small, and grow only as far as the entries so far (`seen`, of `spent` bytes) let expect that `left` bytes allow. One
-- of 250 small entries costs as much an entry as one of 500.
local PAGE_FIRST, PAGE_MAX = 4, 250
local function next_page(size, seen, spent, left)
  return math.min(2 * size, PAGE_MAX, math.floor(left * seen / math.max(spent, 1)) + 1)
end
