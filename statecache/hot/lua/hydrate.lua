-- Brings cold instances back from SQL, those that are still absent.
--
-- KEYS   the meta of each partition touched. Instance keys are built from its prefix and lie in the same slot.
-- ARGV 1 items, a JSON array of [partition index, "machine:id", text of @, ring, SQL's watermark read in the same snapshot
--        as the checkpoint, [field, text, ...]]
--
-- Reply  one string, a line per item:
--   OK                              written
--   EXISTS                          it is hot: nothing written, whatever SQL said
--   STALE evicted_to                SQL's snapshot is older than what Redis has dropped: nothing written
--   EPOCH | RECOVERING | IDENTITY   not admitted: nothing written
-- Cost   about 5 us an item: EXISTS, HSET.
--@include identity
--@include ids
--@include ready_or_fenced
local items, here, refused, evicted, prefixes = cjson.decode(ARGV[1]), identity(), {}, {}, {}
for p = 1, #KEYS do
  refused[p] = refusal(KEYS[p], here, '')
  evicted[p] = redis.call('HGET', KEYS[p], 'evicted_to') or '0-0'
  prefixes[p] = string.sub(KEYS[p], 1, -5) .. 'i:'
end
local lines = {}
for n = 1, #items do
  local item = items[n]
  local p, key = item[1], prefixes[item[1]] .. item[2]
  if refused[p] then
    lines[n] = refused[p]
  elseif redis.call('EXISTS', key) == 1 then
    lines[n] = 'EXISTS'
  elseif id_above(evicted[p], item[5]) then
    lines[n] = 'STALE ' .. evicted[p]
  else
    redis.call('HSET', key, '@', item[3], '@r', item[4], unpack(item[6]))
    lines[n] = 'OK'
  end
end
return table.concat(lines, '\n')
