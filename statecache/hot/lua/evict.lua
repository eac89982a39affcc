-- Drops the hot copies of instances that SQL holds completely. Nothing else drops a hash, but a recovery (drop.lua).
--
-- KEYS   the meta of each partition touched. Instance keys are built from its prefix and lie in the same slot.
-- ARGV 1 items, a JSON array of [partition index, "machine:id", version of the checkpoint, watermark as read from SQL in
--        the same snapshot, unpark: 1 = drop a parked hash, whatever its version, because SQL holds no open letter of it]
--      2 '1': only tell what would be done; nothing is written
--
-- Reply  one string, a line per item:
--   OK                              dropped; cold and evicted_to are set in the same step
--   GONE                            not hot: nothing to do
--   KEPT why                        moved (another version than SQL's), unflushed, parked or claimed: nothing written
--   TYPE                            the instance's key is not a hash of ours. Nothing written
--   EPOCH | RECOVERING | IDENTITY   not admitted: nothing written
-- Cost   about 4 us an item: HGET, UNLINK.
--@include identity
--@include ids
--@include ready_or_fenced
local items, here, refused, evicted, prefixes = cjson.decode(ARGV[1]), identity(), {}, {}, {}
local match, dry = string.match, ARGV[2] == '1'
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
-- A claim goes with the hash, so that its holder would be kept out: it is dropped when the claim has expired. But a parked one
-- that SQL has decided about lets nobody in, its holder neither.
local function claimed(key)
  local held = redis.call('HGET', key, '@c')
  return held and (tonumber(match(held, '^%S+ (%d+) ')) or 0) > now
end
for p = 1, #KEYS do
  refused[p] = refusal(KEYS[p], here, '')
  evicted[p] = redis.call('HGET', KEYS[p], 'evicted_to') or '0-0'
  prefixes[p] = string.sub(KEYS[p], 1, -5) .. 'i:'
end
local lines = {}
for n = 1, #items do
  local p, name, version, watermark, unpark = unpack(items[n])
  local key = prefixes[p] .. name
  local own = not refused[p] and redis.pcall('HGET', key, '@')
  local hot_version, entry_id, flags
  if type(own) == 'string' then hot_version, entry_id, flags = match(own, '^%S+ (%d+) (%S+) %d+ %d+ %d+ ?(.*)$') end
  if refused[p] then
    lines[n] = refused[p]
  elseif not own then
    lines[n] = 'GONE'
  elseif not hot_version then
    lines[n] = 'TYPE'
  elseif match(flags, 'p') and unpark ~= 1 then
    lines[n] = 'KEPT parked'
  elseif not match(flags, 'p') and tonumber(hot_version) ~= version then
    lines[n] = 'KEPT moved'
  elseif id_above(entry_id, watermark) then
    lines[n] = 'KEPT unflushed'
  elseif match(flags, 'c') and not (match(flags, 'p') and unpark == 1) and claimed(key) then
    lines[n] = 'KEPT claimed'
  else
    if not dry then
      if id_above(entry_id, evicted[p]) then evicted[p] = entry_id end
      redis.call('HSET', KEYS[p], 'cold', '1', 'evicted_to', evicted[p])
      redis.call('UNLINK', key)
    end
    lines[n] = 'OK'
  end
end
return table.concat(lines, '\n')
