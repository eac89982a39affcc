local fields_max = tonumber(ARGV[3])

-- What few items need is made when the first of them does: making a function costs each call a third of a microsecond.
local rare
local function rarely()
--@include order
  -- Whether a partition's log that seems full has room: a brake that no flusher has set again for a while is let go. SQL or the
  -- flusher is away, and that is absorbed.
  local brakes_read = {}
  local function has_room(p)
    if not brakes_read[p] then
      local m = call('HMGET', metas[p], 'limit', 'limit_max', 'limit_at')
      if m[2] and m[3] and at - m[3] > 3000 then rooms[p] = rooms[p] + m[2] - m[1] end
      brakes_read[p] = true
    end
    return rooms[p] > 0
  end

  -- The results of increments as [field, text, ...] and as one JSON object text; or nil and the broken rule.
  local function incremented(key, increments)
    local pairs_, texts = {}, {}
    for n = 1, #increments do
      local field, delta, kind = increments[n][1], increments[n][2], increments[n][3]
      local old = (key and call('HGET', key, field)) or '0'
      local value = tonumber(old)
      if not value or not match(old, '^%-?%d') then return nil, 'number ' .. field end
      local result, text = value + tonumber(delta), nil
      if kind == 'i' and match(old, '^%-?%d+$') then
        if math.abs(result) > 9007199254740991 or math.abs(value) > 9007199254740991 then return nil, 'range ' .. field end
        text = string.format('%.0f', result)
      else
        if math.abs(result) >= 1e300 then return nil, 'range ' .. field end
        text = string.format('%.15g', result)
        if tonumber(text) ~= result then text = string.format('%.17g', result) end
      end
      pairs_[#pairs_ + 1], pairs_[#pairs_ + 2] = field, text
      texts[n] = '"' .. field .. '":' .. text
    end
    return pairs_, '{' .. table.concat(texts, ',') .. '}'
  end

  -- Whether a claim keeps an item out: the answer that says so, or nil, and what the flags are from now on. A claim that has
  -- expired ends with the next move of anybody else; its own holder finds out that it is too late.
  local function kept_out(key, flags, token)
    local held = find(flags, 'c', 1, true) and call('HGET', key, '@c')
    if not held then return token ~= '' and 'FENCED - 0', '' end
    local own, until_ms, worker = match(held, '^(%S+) (%d+) %S+ (%S+)$')
    if not own then return 'TYPE' end
    local live = tonumber(until_ms) > tonumber(at)
    if live and token == own then return nil, ' c' end
    if live then return 'FENCED ' .. worker .. ' ' .. until_ms end
    return token ~= '' and 'FENCED - ' .. until_ms, ''
  end

  -- Sets the deadline of a state that has one; leaving such a state takes it away.
  local function note_deadline(p, move, id, from, to)
    local due, name, limit = sub(prefixes[p], 1, -3) .. 'due', move[1] .. ':' .. id, move[5][to]
    if limit then
      call('ZADD', due, string.format('%.0f', at + limit), name)
    elseif move[5][from] then
      call('ZREM', due, name)
    end
  end

  -- A broken rule about the number of fields, or nil. `count` is what it would be if all names were new.
  local function too_many(key, count, fields, first, last, unset)
    for n = first, last, 2 do count = count - call('HEXISTS', key, fields[n]) end
    for n = 1, unset and #unset or 0 do count = count - call('HEXISTS', key, unset[n]) end
    return count > fields_max and ('fields ' .. count) or nil
  end

  rare = {
    has_room = has_room, incremented = incremented, kept_out = kept_out, note_deadline = note_deadline, too_many = too_many,
    id_above = id_above,
  }
  return rare
end

-- Fields are fields[first] to fields[last]. Numbers become text once: each time costs a third of a microsecond. A version has
-- fewer than 14 digits, so `..` may do it, twice as fast as `%.0f`.
local next_id = EPOCH .. '-*'
local function write(p, move, id, key, from, to, version, created, ring, tail, increments, fields, first, last, unset, flags)
  -- From here on nothing may fail: everything was checked, and a script that may run out of memory was refused at its start.
  version = version .. ''
  local entry_id = call('XADD', logs[p], next_id, 'e',
    move[1] .. '\31' .. id .. '\31' .. version .. '\31' .. move[2] .. '\31' .. from .. '\31' .. to .. '\31' .. at
      .. '\31' .. tail .. '\31' .. increments .. '\31' .. move[4])
  call('HSET', key, '@', to .. ' ' .. version .. ' ' .. entry_id .. ' ' .. created .. ' ' .. move[4] .. ' ' .. at
    .. (flags or ''), '@r', ring, unpack(fields, first, last))
  if unset and #unset > 0 then call('HDEL', key, unpack(unset)) end
  if move[5] then (rare or rarely()).note_deadline(p, move, id, from, to) end
  rooms[p] = rooms[p] - 1
  return 'OK ' .. version .. ' ' .. entry_id .. ' ' .. (from == '' and '-' or from) .. ' ' .. to
end

-- Applies the item that begins at items[i] and whose fields are items[first] to items[last].
local function apply(i, first, last)
  local p, id, move, expected, token, tail, extras =
    items[i], items[i + 1], moves[items[i + 2]], items[i + 3], items[i + 4], items[i + 5], items[i + 6]
  local key = prefixes[p] .. move[1] .. ':' .. id
  local own = pcall_('HMGET', key, '@', '@r')
  if own.err then return 'TYPE' end
  local start_state = move[3]['']
  if not own[1] then
    local m = call('HMGET', metas[p], 'cold', 'evicted_to')
    local cold, evicted_to, absent = m[1] or '1', m[2] or '0-0', extras and extras[2] or ''
    if not start_state or (cold ~= '0' and (absent == '' or (rare or rarely()).id_above(evicted_to, absent))) then
      return 'MISS ' .. cold .. ' ' .. evicted_to
    end
    if rooms[p] <= 0 and not (rare or rarely()).has_room(p) then return 'FULL' end
    local count = (last - first + 1) / 2
    if count > fields_max then return 'DATA fields ' .. count end
    return write(p, move, id, key, '', start_state, 1, at, token, tail, '', items, first, last)
  end

  local state, version, created, flags = match(own[1], '^(%S+) (%d+) %S+ (%d+) %d+ %d+ ?(.*)$')
  local ring = own[2]
  if not state or not ring then return 'TYPE' end
  version = tonumber(version)
  local place = find(ring, token, 1, true) -- at multiples of 8 only
  while place and place % 8 ~= 1 do place = find(ring, token, place + 1, true) end
  if place then
    call('HSET', key, '@r', ring) -- a WAIT after this call speaks of this write
    local back = (#ring - place - 7) / 8
    return 'DUP ' .. (version - back) .. ' ' .. (back == 0 and match(own[1], '^%S+ %d+ (%S+)') or '-')
  end
  if extras and extras[1] == 1 and version > #ring / 8 and expected ~= version then
    call('HSET', key, '@r', ring) -- it may prove a duplicate: a WAIT after this call speaks of it too
    return 'OLD ' .. version
  end
  if start_state then return 'EXISTS ' .. version end
  local claim, claimed = extras and extras[5] or '', nil
  if flags ~= '' or claim ~= '' then
    if find(flags, 'p', 1, true) then return 'PARKED' end
    local answer
    answer, claimed = (rare or rarely()).kept_out(key, flags, claim)
    if answer then return answer end
  end
  -- Before the checks of version and state: what follows an item that found no room must not be judged without it.
  if rooms[p] <= 0 and not (rare or rarely()).has_room(p) then return 'FULL' end
  if expected ~= 0 and expected ~= version then return 'VERSION ' .. version end
  local to = move[3][state]
  if not to then return 'STATE ' .. state .. ' ' .. version end
  local fields, unset, increments = items, extras and extras[3], ''
  if extras and #extras[4] > 0 then
    local results, text = (rare or rarely()).incremented(key, extras[4])
    if not results then return 'DATA ' .. text end
    fields, increments = { unpack(items, first, last) }, text
    for n = 1, #results do fields[#fields + 1] = results[n] end
    first, last = 1, #fields
  end
  if last >= first then
    local count = call('HLEN', key) - (flags == '' and 2 or 3) + (last - first + 1) / 2
    local rule = count > fields_max and (rare or rarely()).too_many(key, count, fields, first, last, unset)
    if rule then return 'DATA ' .. rule end
  end
  if claimed == '' then call('HDEL', key, '@c') end
  local pushed = #ring == 64 and sub(ring, 9) .. token or ring .. token
  return write(p, move, id, key, state, to, version + 1, created, pushed, tail, increments, fields, first, last, unset, claimed)
end
